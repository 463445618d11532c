from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from normfree.data.audit import AuditReport, BadImage, audit, require_clean
from normfree.data.sources.folders import FolderSource


def source(root: Path, *, good: int, bad: int) -> FolderSource:
    for i in range(good):
        Image.new("RGB", (4, 4)).save(root / f"good{i:03}.png")
    for i in range(bad):
        (root / f"good{i * 30:03}_bad.png").write_bytes(b"nonsense" * (i % 2))
    samples = [(path.name, 0) for path in sorted(root.iterdir())]
    return FolderSource(root, samples, classes=("a",))


@pytest.mark.parametrize("workers", [1, 4])
def test_every_bad_file_is_found_once_and_in_order(tmp_path: Path, workers: int) -> None:
    steps: list[tuple[int, int]] = []
    report = audit(
        source(tmp_path, good=70, bad=3),
        workers=workers,
        progress=lambda done, total: steps.append((done, total)),
    )
    kinds = "JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM"
    assert report == AuditReport(
        checked=73,
        bad=(
            BadImage(str(tmp_path / "good000_bad.png"), "the file is empty"),
            BadImage(str(tmp_path / "good030_bad.png"), f"not an image, or not one of {kinds}"),
            BadImage(str(tmp_path / "good060_bad.png"), "the file is empty"),
        ),
    )
    assert steps == [(32, 73), (64, 73), (73, 73)]


def test_a_clean_report_passes_and_a_bad_one_names_ten(tmp_path: Path) -> None:
    require_clean(audit(source(tmp_path, good=3, bad=0)))
    bad = tuple(BadImage(f"{i}.png", "the file is empty") for i in range(12))
    with pytest.raises(ValueError, match="cannot be used") as caught:
        require_clean(AuditReport(checked=50, bad=bad))
    assert str(caught.value) == (
        "12 of 50 images cannot be used:\n"
        + "".join(f"  {i}.png: the file is empty\n" for i in range(10))
        + "  and 2 more\nAllowed: images that open completely. Fix: repair these files or delete them."
    )
    with pytest.raises(ValueError, match="cannot be used") as caught:
        require_clean(AuditReport(checked=50, bad=bad[:1]))
    assert str(caught.value) == (
        "1 of 50 images cannot be used:\n  0.png: the file is empty\n"
        "Allowed: images that open completely. Fix: repair these files or delete them."
    )
