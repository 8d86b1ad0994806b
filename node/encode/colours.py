"""The colours of levels and fractures, the same in Segmentations and on drawn pages."""

# After Okabe and Ito, for eyes that confuse red and green: neighbours differ in hue, and none is a fracture's red.
LEVEL_RGB = {
    "C1": (86, 180, 233),
    "C2": (240, 228, 66),
    "C3": (0, 158, 115),
    "C4": (204, 121, 167),
    "C5": (0, 114, 178),
    "C6": (230, 159, 0),
    "C7": (144, 238, 144),
}
FRACTURE_RGB = (255, 0, 0)
