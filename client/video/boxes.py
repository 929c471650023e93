"""Where something is in a frame: rectangles, and how far two are the same place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in a frame, in its pixels; `right` and `bottom` are the first ones outside."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def area(self) -> int:
        return self.width * self.height

    @property
    def center(self) -> tuple[float, float]:
        """Column and row."""
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2

    def common_area(self, other: Box) -> int:
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(width, 0) * max(height, 0)

    def iou(self, other: Box) -> float:
        """Intersection over union, 0 to 1."""
        common = self.common_area(other)
        return common / (self.area + other.area - common)

    def union(self, other: Box) -> Box:
        return Box(
            min(self.left, other.left),
            min(self.top, other.top),
            max(self.right, other.right),
            max(self.bottom, other.bottom),
        )

    def scaled(self, x: float, y: float) -> Box:
        return Box(round(self.left * x), round(self.top * y), round(self.right * x), round(self.bottom * y))

    def __str__(self) -> str:
        return f"{self.width}x{self.height}+{self.left}+{self.top}"
