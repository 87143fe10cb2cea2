"""Former names of the bitmap products, for code that was written before they were renamed."""

from .bitmap import BitmapPattern as PackedPattern
from .bitmap import bitmap_conv1d as packed_conv1d
from .bitmap import bitmap_conv2d as packed_conv2d
from .bitmap import bitmap_linear as packed_linear
from .bitmap import bitmap_pattern as packed_pattern

__all__ = ["PackedPattern", "packed_conv1d", "packed_conv2d", "packed_linear", "packed_pattern"]
