"""FLOPs, time, memory and quality of real runs, comparisons, and the check of every claim."""

from foveate.measure.claims import Checked, verify
from foveate.measure.compare import Comparison, Overlay, Row, compare

__all__ = ["Checked", "Comparison", "Overlay", "Row", "compare", "verify"]
