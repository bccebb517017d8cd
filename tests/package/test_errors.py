"""Errors carry their facts, also across processes."""

import pickle

from dualpipe_ext.errors import DualPipeError, ExchangeClosedError, PeerTimeoutError


def test_peer_timeout_names_everything_and_survives_pickling():
    facts = dict(
        rank=0, peer=2, channel="forward", phase="dispatch", expected=3, seen=1, timeout=0.5
    )
    error = pickle.loads(pickle.dumps(PeerTimeoutError(**facts)))
    assert vars(error) == facts
    assert str(error).startswith("rank 0 waited 0.5 s for rank 2 in dispatch on channel 'forward'")
    assert "flag shows 1, expected 3" in str(error)


def test_every_error_is_a_runtime_error():
    for kind in (DualPipeError, ExchangeClosedError, PeerTimeoutError):
        assert issubclass(kind, DualPipeError)
        assert issubclass(kind, RuntimeError)
