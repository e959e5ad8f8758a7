"""Somebody on the head with the cluster's token: 23 attacks, each run inside the store's actor by `__ray_call__`.

    insider.py FOLDER    as the user that Ray runs as; FOLDER/brief.json says what there is

Every attack returns what it got hold of; it is written to FOLDER/loot, where the test looks for images in it. An
attack that can run something as the site's user leaves a file in FOLDER/drop, whose owner tells who ran it.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import pickle
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

BRIEF = json.loads((Path(sys.argv[1]) / "brief.json").read_text()) if len(sys.argv) > 1 else {}
MESSAGES = {name: bytes.fromhex(raw) for name, raw in BRIEF.get("messages", {}).items()}


def main() -> None:
    os.environ.update(BRIEF["environment"])
    import ray

    from raypipe.config.schema import Store
    from raypipe.placement.actor import start_local
    from raypipe.store.client import StoreClient

    start_local(list(BRIEF["homes"]), 4, 2**20)
    try:
        clients = {s: StoreClient(Store(id=s), "r", 1, "c0de", t) for s, t in BRIEF["transports"].items()}
        found: dict[str, dict[str, str]] = {}
        for store, client in clients.items():
            asyncio.run(client.join())
            found[store] = {}
            for attack in ATTACKS:
                act = _looted(attack, {**BRIEF, "store": store, "home": BRIEF["homes"][store]}, MESSAGES)
                found[store][attack.__name__] = ray.get(client._actor.__ray_call__.remote(act), timeout=60)
        for store, client in clients.items():
            found[store]["afterwards"] = asyncio.run(client.join()).store
        (Path(sys.argv[1]) / "found.json").write_text(json.dumps(found))
    finally:
        ray.shutdown()


def _looted(attack: Any, brief: dict[str, Any], messages: dict[str, bytes]) -> Any:
    """As it runs in the actor: what came of it as one line, the loot in a file."""

    def act(actor: Any) -> str:
        loot = bytearray()
        try:
            attack(actor, brief, messages, loot)
            end = "done"
        except BaseException as error:  # noqa: BLE001
            end = f"{type(error).__name__}: {error}"[:300]
        (Path(brief["folder"]) / "loot" / f"{brief['store']}-{attack.__name__}").write_bytes(bytes(loot))
        return end

    return act


def _each(loot: bytearray, *tries: Any) -> None:
    """All of them, whatever comes of one."""
    for number, attempt in enumerate(tries):
        try:
            loot += f"[{number}]".encode() + _raw(attempt())
        except Exception as error:  # noqa: BLE001
            loot += f"[{number} {type(error).__name__}: {error}]".encode()[:300]


def _raw(value: Any) -> bytes:
    if isinstance(value, np.ndarray):
        return value.tobytes()
    return value if isinstance(value, bytes) else repr(value).encode()


def _line(actor: Any, pipe: bool = False) -> Any:
    """A connection of the insider's own to the vault; a site that is here has none."""
    from raypipe.vault.client import Line

    line = Line(actor._site._path, actor._store, pipe=pipe, speaks=(3,))
    line.connect()
    return line


def _ask(actor: Any, body: dict[str, Any]) -> Any:
    line = _line(actor)
    try:
        line.channel.send(body)
        return line.channel.receive(10)
    finally:
        line.drop()


def _guards() -> list[int]:
    """Processes of vaults on this machine."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdecimal() and b"vault.py" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def _messages(messages: dict[str, bytes], **changes: Any) -> tuple[Any, Any, Any]:
    """A recorded ticket and plan with changes, and the weights they were for."""
    from dataclasses import fields, replace

    from raypipe.store import messages as msg

    own = {field.name for field in fields(msg.Ticket)}
    ticket, plan = msg.expect(msg.Ticket, messages["ticket"]), msg.expect(msg.Plan, messages["plan"])
    ticket = replace(ticket, **{key: value for key, value in changes.items() if key in own})
    plan = replace(plan, **{key: value for key, value in changes.items() if key not in own})
    return ticket, plan, np.frombuffer(messages["weights"], np.float32)


def _train(actor: Any, brief: dict[str, Any], messages: dict[str, bytes], **changes: Any) -> Any:
    ticket, plan, weights = _messages(messages, store=brief["store"], **{"base": (brief["proof"],), **changes})
    return actor._site.train(ticket, plan, weights)


# -- the attacks: (the actor, what is known, recorded messages, loot) ---------------------------------------------


def read_the_folder(actor: Any, brief: dict[str, Any], messages: dict[str, bytes], loot: bytearray) -> None:
    for path in sorted(Path(brief["home"]).rglob("*.parquet")):
        loot += path.read_bytes()
    loot += str(os.listdir(brief["home"])).encode()


def take_decoded_images_from_memory(
    actor: Any, brief: dict[str, Any], messages: dict[str, bytes], loot: bytearray
) -> None:
    _each(loot, lambda: _train(actor, brief, messages, id="memory"))
    import torch

    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.dtype == torch.uint8:
            loot += thing.numpy().tobytes()


def open_the_images_with_the_stores_own_code(
    actor: Any, brief: dict[str, Any], messages: dict[str, bytes], loot: bytearray
) -> None:
    data = actor._site._shelf.data("products").split("train")
    loot += data.decode(np.arange(40), size=12, channels=1)[0].tobytes()


def run_a_command_as_the_site(actor: Any, brief: dict[str, Any], messages: dict[str, bytes], loot: bytearray) -> None:
    os.system(f"id > {brief['drop']}/{brief['store']}-command")


def read_its_keys_and_outbox(actor: Any, brief: dict[str, Any], messages: dict[str, bytes], loot: bytearray) -> None:
    home = Path(brief["home"])
    _each(loot, *((home / name).read_bytes for name in ("policy.yaml", "budget.json", "keys/store.pem", "site.log")))
    _each(loot, *(path.read_bytes for path in home.rglob("slot-*")))


def read_its_memory(actor: Any, brief: dict[str, Any], messages: dict[str, bytes], loot: bytearray) -> None:
    for process in _guards():
        for name in ("mem", "maps", "environ", "cwd/home/policy.yaml", "root/etc/shadow"):
            _each(loot, Path(f"/proc/{process}/{name}").read_bytes)
        _each(loot, lambda process=process: os.listdir(f"/proc/{process}/fd"))  # type: ignore[misc]


def trace_it(actor: Any, brief: dict[str, Any], messages: dict[str, bytes], loot: bytearray) -> None:
    for process in _guards():
        library = ctypes.CDLL(None, use_errno=True)
        assert library.ptrace(16, process, None, None) == 0, os.strerror(ctypes.get_errno())
        (Path(brief["drop"]) / f"{brief['store']}-traced").touch()
    raise AssertionError("no process of another user to trace")


def kill_it(actor: Any, brief: dict[str, Any], messages: dict[str, bytes], loot: bytearray) -> None:
    for process in _guards():
        os.kill(process, 9)


def change_its_code(actor: Any, brief: dict[str, Any], messages: dict[str, bytes], loot: bytearray) -> None:
    place, evil = Path(brief["home"]).parent, f"open('{brief['drop']}/{brief['store']}-code', 'w')\n"
    targets = [place / "code" / "raypipe" / "store" / "site.py", place / "code" / "sitecustomize.py"]
    targets += [place / "code" / "vault.py", place / "vault.yaml", place / "start.sh", Path(sys.prefix, "x.pth")]
    _each(loot, *(lambda t=t: t.open("a").write(evil) for t in targets))  # type: ignore[misc]


def take_its_place(actor: Any, brief: dict[str, Any], messages: dict[str, bytes], loot: bytearray) -> None:
    gate = Path(brief["home"]).parent / "gate"
    _each(loot, (gate / "vault.sock").unlink, lambda: gate.rename(gate.with_name("old")), (gate / "x").touch)


def reset_the_budget(actor: Any, brief: dict[str, Any], messages: dict[str, bytes], loot: bytearray) -> None:
    home = Path(brief["home"])
    _each(loot, (home / "budget.json").unlink, lambda: (home / "policy.yaml").write_text("store: south"))
    _each(loot, *(lambda n=n: _train(actor, brief, messages, run=f"new{n}", id=f"n{n}") for n in range(3)))  # type: ignore[misc]
    quick = {"max_steps": 1, "max_epochs": None}
    _each(loot, *(lambda n=n: _train(actor, brief, messages, id=f"m{n}", **quick) for n in range(25)))  # type: ignore[misc]


def path_tricks(actor: Any, brief: dict[str, Any], messages: dict[str, bytes], loot: bytearray) -> None:
    up = "../../../../../../../etc/passwd"
    _each(
        loot,
        lambda: actor._site.describe(up, 1),
        lambda: actor._site.describe("/etc", 1),
        lambda: _train(actor, brief, messages, run="..", id="up"),
        lambda: _train(actor, brief, messages, data=up),
        lambda: _train(actor, brief, messages, data="products/../../etc"),
        lambda: actor._site.collect(up, [], up, 1),
        lambda: actor._site.collect("\0", [], "r\0", 1),
        lambda: actor._site.evaluate(_messages(messages)[1], _messages(messages)[2], up, 1),
    )


def name_code_in_a_plan(actor: Any, brief: dict[str, Any], messages: dict[str, bytes], loot: bytearray) -> None:
    evil = f"__import__('os').system('touch {brief['drop']}/{brief['store']}-plan')"
    for part in ("model", "task", "optimizer", "schedule"):
        for name in ("os.system", evil, "../../evil", "builtins.eval"):
            _each(loot, lambda part=part, name=name: _train(actor, brief, messages, **{part: {"name": name}}))  # type: ignore[misc]
    _each(loot, lambda: _train(actor, brief, messages, model={"name": "small_cnn", "width": evil}))
    _each(loot, lambda: actor._site.collect("t1", [{"name": evil}], "r", 1))


def pickles(actor: Any, brief: dict[str, Any], messages: dict[str, bytes], loot: bytearray) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {brief['drop']}/{brief['store']}-pickle",)

    evil = pickle.dumps(Evil())
    for verb in ("describe", "train", "evaluate", "collect", "settle", "control", "piece"):
        fields = dict.fromkeys(("ticket", "plan", "verdict", "data", "proof", "how", "run", "digest"), evil)
        _each(loot, lambda verb=verb, fields=fields: _ask(actor, {"verb": verb, **fields}))  # type: ignore[misc]


def giant_plans(actor: Any, brief: dict[str, Any], messages: dict[str, bytes], loot: bytearray) -> None:
    task = {"name": "classification", "classes": 3, "image_size": 1024, "channels": 3}
    many = {**task, "classes": [f"class-{n}" for n in range(60_000)]}
    _each(
        loot,
        lambda: _train(actor, brief, messages, batch_size=10**12),
        lambda: _train(actor, brief, messages, batch_size=4096, task=task),
        lambda: _train(actor, brief, messages, task=many),
        lambda: _train(actor, brief, messages, model={"name": "small_cnn", "hidden": 10**15}),
        lambda: _ask(actor, {"verb": "announce", "digest": "b3:0", "num_bytes": 1 << 50}),
        lambda: _ask(actor, {"verb": "train", "num_bytes": -4, "plan": messages["plan"]}),
        lambda: actor._site.collect("t1", [{"name": "float32"}] * 100_000, "r", 1),
    )


def learn_one_image(actor: Any, brief: dict[str, Any], messages: dict[str, bytes], loot: bytearray) -> None:
    """A gradient of one image tells the image; for this model nearly so."""
    _train(actor, brief, messages, id="one", batch_size=1, max_steps=1, max_epochs=None)
    loot += actor._site.collect("one", [], "r", 1).tobytes()
    (Path(brief["drop"]) / f"{brief['store']}-one-image").touch()


def replay(actor: Any, brief: dict[str, Any], messages: dict[str, bytes], loot: bytearray) -> None:
    from raypipe.store import messages as msg

    for _ in range(3):
        _each(loot, lambda: _train(actor, brief, messages, id="again"))
        _each(loot, lambda: actor._site.settle(msg.Verdict("again", 1, run="r", epoch=1)))
    _each(loot, lambda: actor._site.collect("again", [], "r", 1))


def wrong_epochs(actor: Any, brief: dict[str, Any], messages: dict[str, bytes], loot: bytearray) -> None:
    from raypipe.store import messages as msg

    for epoch in (0, -1, 2**80, "1", None, True):
        body = {"verb": "collect", "ticket": "t1", "how": [], "run": "r", "epoch": epoch}
        _each(loot, lambda body=body: _ask(actor, body))  # type: ignore[misc]
        _each(loot, lambda epoch=epoch: _train(actor, brief, messages, run="epochs", epoch=epoch))  # type: ignore[misc]
    _each(loot, lambda: actor._site.settle(msg.Verdict("t1", 1)), lambda: actor._site.collect("t1", []))


def a_base_of_ones_own(actor: Any, brief: dict[str, Any], messages: dict[str, bytes], loot: bytearray) -> None:
    from dataclasses import replace

    ticket, plan, weights = _messages(messages, store=brief["store"], id="own")
    mine, forged = np.ones_like(weights), json.loads(json.dumps(brief["proof"]))
    forged["entry"]["body"]["digest"] = "b3:" + "0" * 64
    for proof in ((brief["proof"],), (forged,), (), ({},), ({**brief["proof"], "since": 2**60},)):
        _each(loot, lambda proof=proof: actor._site.train(replace(ticket, base=proof), plan, mine))  # type: ignore[misc]
    loot += actor._site.collect("own", [], "r", 1).tobytes()
    (Path(brief["drop"]) / f"{brief['store']}-base").touch()


def malformed_frames(actor: Any, brief: dict[str, Any], messages: dict[str, bytes], loot: bytearray) -> None:
    rng = np.random.default_rng(0)
    deep = b"\x91" * 500_000
    bodies = [b"", b"\xc1", b"\xc0", deep, msgpack.packb([1]), msgpack.packb({1: 2}), rng.bytes(300), b"\xdf" * 5]
    frames = [b"rpv\x01" + struct.pack("!I", len(body)) + body for body in bodies]
    for frame in [*frames, b"GET / HTTP/1.1\r\n\r\n", b"\0" * 64]:
        line = _line(actor)
        line.channel._sock.sendall(frame)
        _each(loot, lambda line=line: line.channel.receive(3))  # type: ignore[misc]
        line.drop()


def oversized_frames(actor: Any, brief: dict[str, Any], messages: dict[str, bytes], loot: bytearray) -> None:
    line = _line(actor)
    line.channel._sock.sendall(b"rpv\x01" + struct.pack("!I", 0xFFFFFFFF))
    _each(loot, lambda: line.channel._sock.sendall(b"x" * (64 << 20)), lambda: line.channel.receive(3))
    line.drop()


def slowloris(actor: Any, brief: dict[str, Any], messages: dict[str, bytes], loot: bytearray) -> None:
    held = []
    for _ in range(60):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(actor._site._path))
        sock.sendall(b"rpv")
        held.append(sock)
    time.sleep(0.5)
    assert actor._site.ping(), "it does not answer any more"


def keep_its_descriptors(actor: Any, brief: dict[str, Any], messages: dict[str, bytes], loot: bytearray) -> None:
    import mmap

    _each(loot, lambda: _train(actor, brief, messages, id="held"), lambda: actor._site.collect("held", [], "r", 1))
    line = _line(actor, pipe=True)
    line.channel.send({"verb": "collect", "ticket": "held", "how": [], "run": "r", "epoch": 1})
    answer = line.channel.receive(5)
    files = [line.writer, *line.channel.files]
    for file in files:
        again = f"/proc/self/fd/{file}"
        _each(
            loot,
            lambda file=file: os.pwrite(file, b"x", 0),  # type: ignore[misc]
            lambda file=file: os.ftruncate(file, 0),  # type: ignore[misc]
            lambda file=file: mmap.mmap(file, 64, prot=mmap.PROT_WRITE),  # type: ignore[misc]
            lambda again=again: os.open(again, os.O_RDWR),  # type: ignore[misc]
            lambda again=again: os.read(os.open(again, os.O_RDONLY | os.O_NONBLOCK), 4096),  # type: ignore[misc]
            lambda file=file: os.open("..", os.O_RDONLY, dir_fd=file),  # type: ignore[misc]
        )
    loot += repr(answer).encode()


ATTACKS = [
    read_the_folder, take_decoded_images_from_memory, open_the_images_with_the_stores_own_code,
    run_a_command_as_the_site, read_its_keys_and_outbox, read_its_memory, trace_it, kill_it,
    change_its_code, take_its_place, path_tricks, name_code_in_a_plan, pickles, giant_plans, learn_one_image,
    replay, wrong_epochs, a_base_of_ones_own, malformed_frames, oversized_frames, slowloris, keep_its_descriptors,
    reset_the_budget,
]  # fmt: skip

if __name__ == "__main__":
    main()
