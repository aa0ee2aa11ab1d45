from itertools import pairwise

from lightprune.reweighting.history import History


def test_it_keeps_few_rows_spread_evenly() -> None:
    history = History(8)
    for number in range(1000):
        history.append({"number": number})
        rows = history.column("number")
        assert len(rows) <= 8
        assert rows[0] == 0
        gaps = {later - earlier for earlier, later in pairwise(rows)}
        assert len(gaps) <= 1
        assert number < 4 or len(rows) > 3
    assert history.column("number") == [0, 128, 256, 384, 512, 640, 768, 896]


def test_it_goes_on_from_its_state() -> None:
    whole, first = History(8), History(8)
    for number in range(21):
        whole.append({"number": number})
        first.append({"number": number})
    second = History(8)
    second.load_state_dict(first.state_dict())
    for number in range(21, 60):
        whole.append({"number": number})
        second.append({"number": number})
    assert list(second) == list(whole)
