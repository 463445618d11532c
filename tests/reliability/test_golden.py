"""Goal 11 in small numbers: known losses, earlier formats, work without a network."""

import pytest

from reliability import golden


@pytest.mark.slow
@pytest.mark.parametrize("case", list(golden.cases(3)), ids=lambda case: case.name)
def test_known_losses_earlier_formats_and_no_network(case):
    result = case.run()
    assert result.passed == result.wanted, result.detail


@pytest.mark.parametrize("file", sorted(golden.FORMATS.glob("*.tar.xz")), ids=lambda file: file.name)
def test_a_run_of_an_earlier_format_resumes(file):
    result = golden.resumed_format(file)
    assert result.passed == 1, result.detail


def test_a_connection_is_noticed(tmp_path):
    hook = golden.NoNetwork(tmp_path)
    with pytest.raises(PermissionError):
        hook.refuse("socket.connect", (None, ("127.0.0.1", 9)))
    hook.refuse("socket.connect", (None, "/tmp/local"))
    hook.refuse("open", ("a", "r", 0))
    assert len((tmp_path / "connections.txt").read_text().splitlines()) == 1
