"""A model bundle that never saw a neck, for tests that are about everything but the model."""

from pathlib import Path


def write_untrained_bundle(folder: Path) -> Path:
    """Writes small networks that load and run in no time, and find nothing; returns the folder."""
    from model.bundle import Bundle, ClassifySettings, SegmentSettings, write_bundle
    from model.findings import ModelInfo

    bundle = Bundle(
        folder=folder,
        info=ModelInfo(name="untrained", version="0.0.1", trained_on="Nothing.", operating_point=0.5),
        segment=SegmentSettings(channels=(4, 8), spacing_mm=3.0),
        classify=ClassifySettings(
            encoder="residual-4-8", num_hidden=4, num_slices=3, num_pixels=32, pixel_mm=1.0, region_threshold=0.5
        ),
        metrics={},
    )
    write_bundle(bundle, bundle.new_networks())
    return folder
