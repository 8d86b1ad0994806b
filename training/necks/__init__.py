"""Vertebrae on real necks without one labelled patient: synthetic necks from an atlas, and pseudo-labels on real CT."""
