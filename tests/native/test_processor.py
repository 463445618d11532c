"""The kind of processor does not change within a process, and its makers are told apart."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from normfree.native import processor


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    processor._is_amd.cache_clear()
    yield
    processor._is_amd.cache_clear()


def test_the_kind_begins_with_what_torch_uses() -> None:
    found = processor.processor_kind()
    assert found.removesuffix(" AMD") == torch.backends.cpu.get_cpu_capability()


@pytest.mark.parametrize(
    ("capability", "maker", "kind"),
    [
        ("AVX512", "AuthenticAMD", "AVX512 AMD"),
        ("AVX512", "GenuineIntel", "AVX512"),
        ("AVX2", "AuthenticAMD", "AVX2"),
        ("DEFAULT", "", "DEFAULT"),
    ],
)
@pytest.mark.parametrize("system", ["Linux", "another"])
def test_kinds(monkeypatch: pytest.MonkeyPatch, capability: str, maker: str, kind: str, system: str) -> None:
    """Linux has the maker's name in a file, Windows in the name of the processor."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(Path, "is_file", lambda path: system == "Linux")
    monkeypatch.setattr(Path, "read_text", lambda path, **options: f"vendor_id\t: {maker}\n")
    monkeypatch.setattr(
        processor.platform, "processor", lambda: f"AMD64 Family 25 Model 33 Stepping 2, {maker}"
    )
    assert processor.processor_kind() == kind
