"""What a scrape says, read back."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from common.metrics import PREFIX, Definition


class Scrape:
    """Numbers by name and labels."""

    def __init__(self, text: bytes | str) -> None:
        families = list(text_string_to_metric_families(text.decode() if isinstance(text, bytes) else text))
        self.types = {family.name: family.type for family in families}
        self.samples = [sample for family in families for sample in family.samples]

    @property
    def names(self) -> set[str]:
        return {sample.name for sample in self.samples}

    def samples_of(self, name: str) -> list[tuple[dict[str, str], float]]:
        return [(sample.labels, sample.value) for sample in self.samples if sample.name == name]

    def sum_of(self, name: str, /, **labels: str) -> float:
        """Of all series that have these labels; 0: there is none."""
        return sum(s.value for s in self.samples if s.name == name and labels.items() <= s.labels.items())

    def value(self, of: Definition, /, **labels: str) -> float:
        """Of a counter or gauge."""
        return self.sum_of(PREFIX + of.name, **labels)

    def count(self, of: Definition, /, **labels: str) -> float:
        """How often a histogram observed something."""
        return self.sum_of(f"{PREFIX}{of.name}_count", **labels)

    def total(self, of: Definition, /, **labels: str) -> float:
        """The sum of what a histogram observed."""
        return self.sum_of(f"{PREFIX}{of.name}_sum", **labels)
