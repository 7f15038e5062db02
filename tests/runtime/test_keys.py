from __future__ import annotations

import inspect

import pytest

from common.runtime import keys


def test_every_key_is_in_the_table_of_the_file() -> None:
    made = [
        keys.scheduler_lease(),
        keys.term(keys.scheduler_lease()),
        keys.worker_lease("<worker>"),
        keys.router_lease("<router>"),
        keys.request("<request>"),
        keys.kv("<request>", "<worker>"),
        keys.prompt("<request>", 0).removesuffix("0") + "<attempt>",
    ]
    assert keys.__doc__ is not None
    assert [key for key in made if f"`{key}`" not in keys.__doc__] == []
    assert len(set(made)) == len(made)


def test_prefixes_cover_their_keys_and_no_others() -> None:
    assert keys.worker_lease("w").startswith(keys.worker_leases())
    assert keys.router_lease("r").startswith(keys.router_leases())
    assert keys.request("r").startswith(keys.requests())
    assert keys.kv("r", "w").startswith(keys.kv_of("r"))
    assert keys.kv_of("r").startswith(keys.kv_all())
    assert not keys.kv("r1", "w").startswith(keys.kv_of("r"))
    assert not keys.scheduler_lease().startswith((keys.worker_leases(), keys.router_leases()))


@pytest.mark.parametrize("bad", ["", "a:b", "a b", "a\n"])
def test_an_id_that_could_collide_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="colon"):
        keys.request(bad)


def test_every_key_tells_who_writes_it() -> None:
    for name, function in inspect.getmembers(keys, inspect.isfunction):
        assert function.__doc__, name
