"""The stores' own machines as Ray nodes: an external NodeProvider for `ray up`, one node type a store.

Ray's `local` provider knows one node type for all machines, so that a store's resource could not be asked for. Here
each node type names its host (`node_config: {store: harbour, host: 10.1.0.7}`). To create a node is to wake its
machine, if a command for that is given, and to let Ray's updater start Ray there over ssh. To terminate it ends the
processes of that Ray node, found by the id that each has in its environment, and nothing else on that machine.

Who is up is a small file: on the head for the stores, on the machine that calls `ray up` for the head. An id is
never used twice, since Ray's autoscaler takes a node that is back under an old id for the dead one.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
from ray.autoscaler._private.command_runner import SSHCommandRunner
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import NODE_KIND_HEAD, TAG_RAY_NODE_KIND

from raypipe.placement.book import Book, books
from raypipe.placement.inventory import open_at
from raypipe.placement.ssh import Login, SshError, options, run

log = logging.getLogger(__name__)

HEAD_KEY = "~/ray_bootstrap_key.pem"  # where `ray up` puts the key with which the head reaches the stores
AT_ONCE = 32
FAILED = "`ray start` failed there: monitor.out, among Ray's logs on the head, has what it said"
# The processes of one Ray node: those with its id in their environment, and all that they started, since some put
# their title where their environment was. Five seconds to end by themselves, and five to be ended.
STOP = r"""
node={node}
roots=$(grep -lzxF "RAY_CLOUD_INSTANCE_ID=$node" /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3)
ours=$(cat /proc/[0-9]*/stat 2>/dev/null | sed "s/(.*)/x/" | awk -v roots="$(echo $roots)" '
  {{ parent[$1] = $4 }}
  END {{ split(roots, list, " "); for (i in list) ours[list[i]] = 1
        do {{ more = 0
             for (p in parent) if (!(p in ours) && parent[p] in ours) {{ ours[p] = 1; more = 1 }} }} while (more)
        for (p in ours) print p }}')
left() {{ for p in $ours; do sed -n "s/.*) [^ZX] .*/$p/p" /proc/$p/stat 2>/dev/null; done; }}
gone() {{ for i in 1 2 3 4 5; do [ -z "$(left)" ] && return; sleep 1; done; [ -z "$(left)" ]; }}
kill -TERM $ours 2>/dev/null
gone || {{ kill -KILL $(left) 2>/dev/null; gone; }} || {{ echo processes $(left) of $node do not end >&2; false; }}
"""


class StoreProvider(NodeProvider):
    """`provider: {type: external, module: raypipe.placement.provider.StoreProvider, head_host: ...}`."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._on_head = bool(provider_config.get("head"))  # put there by `prepare_for_head_node`
        self._book = Book(books() / f"{cluster_name}.json")
        self._login = Login(provider_config["ssh_user"], provider_config.get("ssh_private_key"))
        self._ended: set[str] = set()
        if self._on_head:
            self._book.put(**provider_config["head"])
        elif self._login.key and not os.access(os.path.expanduser(self._login.key), os.R_OK):  # Ray reads it next
            raise click.ClickException(f"auth: ssh_private_key: {self._login.key} is not there, or not yours to read")

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        """The provider gets in as `auth:` says; a node that does not come has its ssh login said nowhere else."""
        auth, provider = cluster_config["auth"], cluster_config["provider"]
        provider["ssh_user"] = auth["ssh_user"]
        if auth.get("ssh_private_key"):
            provider["ssh_private_key"] = auth["ssh_private_key"]
        return cluster_config

    def prepare_for_head_node(self, cluster_config: dict[str, Any]) -> dict[str, Any]:
        """The head has to know itself, else the autoscaler believes it gone and starts nothing."""
        provider = cluster_config["provider"]
        (head,) = self.non_terminated_nodes({TAG_RAY_NODE_KIND: NODE_KIND_HEAD})
        provider["head"] = {"node": head, **self._book.read()[head]}
        if provider.get("ssh_private_key"):
            provider["ssh_private_key"] = HEAD_KEY
        return cluster_config

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> None:
        """Wake the machine and say that it is there; Ray's updater does the rest. Called from several threads."""
        host = node_config.get("host") or self.provider_config.get("head_host")
        store = node_config.get("store", "head")
        if not host:
            raise NodeLaunchException("no host", f"{store}: its node_config names no host", None)
        if tags.get(TAG_RAY_NODE_KIND) == NODE_KIND_HEAD:
            self._try_head(host)
            node = f"{self.cluster_name}-head"
        else:
            node = f"{store}-{time.time_ns():x}"
            if not open_at(node_config.get("hours", ""), time.time()):
                raise NodeLaunchException("closed", f"{store}: trains only {node_config['hours']}", None)
        if wake := node_config.get("wake"):
            threading.Thread(target=_wake, args=(store, wake), daemon=True).start()
        self._book.put(node=node, host=host, tags=tags)

    def _try_head(self, host: str) -> None:
        """Now, in one line, rather than after Ray has tried for a quarter of an hour."""
        try:
            run(self._login, host, "true")
        except SshError as error:
            raise click.ClickException(f"the head cannot be started: {error}") from None

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        """Ids."""
        book = self._book.read()
        return [node for node, one in book.items() if tag_filters.items() <= one["tags"].items()]

    def nodes_for_teardown(self, tag_filters: dict[str, str]) -> list[str]:
        """For `ray down`: the head knows which stores are up."""
        if not self._on_head:
            self._ask_head()
        return self.non_terminated_nodes(tag_filters)

    def _ask_head(self) -> None:
        known = self._book.read()
        heads = [one["host"] for one in known.values() if one["tags"].get(TAG_RAY_NODE_KIND) == NODE_KIND_HEAD]
        for host in heads:
            try:
                there = json.loads(run(self._login, host, f"cat {self._remote_book()}"))
            except (SshError, ValueError) as error:
                log.warning("which stores are up could not be asked: %s", error)
                continue
            for node in there.keys() - known.keys() - self._ended:
                self._book.put(node=node, **there[node])

    def _remote_book(self) -> str:
        return f'"${{RAYPIPE_HOME:-$HOME/.raypipe}}/cluster/"{shlex.quote(self.cluster_name)}.json'

    def is_running(self, node_id: str) -> bool:
        """As soon as it is created: whether its machine is awake, ssh shows."""
        return node_id in self._book.read()

    def is_terminated(self, node_id: str) -> bool:
        """Whether it was taken down, or never was."""
        return node_id not in self._book.read()

    def node_tags(self, node_id: str) -> dict[str, str]:
        """Empty for a node that is gone."""
        tags: dict[str, str] = self._book.read().get(node_id, {}).get("tags", {})
        return tags

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        """Of a node that is there."""
        self._book.tag(node_id, tags)

    def external_ip(self, node_id: str) -> str:
        """Its host, as `stores.csv` has it."""
        host: str = self._book.read().get(node_id, {}).get("host", "")
        return host

    def internal_ip(self, node_id: str) -> str:
        """The same: all machines are in one private network."""
        return self.external_ip(node_id)

    def note(self, node_id: str, trouble: str) -> None:
        """Why a node does not come, for the coordinator and the doctor to say; "" when it does."""
        if self._book.note(node_id, trouble) and trouble:
            log.warning("%s does not start: %s", node_id, trouble)

    def terminate_node(self, node_id: str) -> None:
        """Stop Ray there. A machine that does not answer is let go: its Ray ends itself a minute after its head."""
        one = self._book.read().get(node_id)
        if one is None:
            return
        command = STOP.format(node=shlex.quote(node_id))
        is_head = one["tags"].get(TAG_RAY_NODE_KIND) == NODE_KIND_HEAD
        if is_head:  # its book goes with it: the next one must not take these stores for its own
            command = f"({command}) && rm -f {self._remote_book()}"
        try:
            if self._on_head or is_head:
                run(self._login, one["host"], command)
            else:
                self._through_head(one["host"], command)
        except SshError as error:
            log.warning("%s: Ray could not be stopped there: %s", node_id, error)
        self._ended.add(node_id)
        self._book.remove(node_id)

    def terminate_nodes(self, node_ids: list[str]) -> None:
        """Side by side, the head last, since the way to the stores leads through it."""
        heads = {node for node in node_ids if self.node_tags(node).get(TAG_RAY_NODE_KIND) == NODE_KIND_HEAD}
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(self.terminate_node, [node for node in node_ids if node not in heads]))
        for node in heads:
            self.terminate_node(node)

    def _through_head(self, host: str, command: str) -> None:
        """The machine of whoever calls `ray down` need not reach the stores, nor hold a key that opens them."""
        key = f"-i {HEAD_KEY} -oIdentitiesOnly=yes" if self._login.key else ""
        known = '-oUserKnownHostsFile="${RAYPIPE_HOME:-$HOME/.raypipe}"/known_hosts'
        how = f"ssh -oBatchMode=yes -oStrictHostKeyChecking=accept-new {known} -oConnectTimeout=10 {key}"
        for one in self._book.read().values():
            if one["tags"].get(TAG_RAY_NODE_KIND) == NODE_KIND_HEAD:
                run(self._login, one["host"], f"{how} {self._login.user}@{host} -- {shlex.quote(command)}")
                return
        run(self._login, host, command)

    def get_command_runner(self, *args: Any, **kwargs: Any) -> Any:
        """Ray's, with a machine's key checked, and files copied without rsync."""
        runner = super().get_command_runner(*args, **kwargs)
        runner.__class__ = CheckedRunner
        return runner


class CheckedRunner(SSHCommandRunner):
    """Ray's runner with our ssh options."""

    def _set_ssh_ip_if_required(self) -> None:
        super()._set_ssh_ip_if_required()
        self.ssh_options.arg_dict |= options(Login(self.ssh_user, self.ssh_private_key), 10.0)

    def run(self, cmd: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """What an earlier start of this very node has left is ended first: it holds the ports.

        `ray start` gives up after half a minute, and leaves what it has started. Ray tries `uptime` for a quarter of
        an hour and says why not in a log of its own.
        """
        self._set_ssh_ip_if_required()
        login, host = Login(self.ssh_user, self.ssh_private_key), str(self.ssh_ip)
        try:
            if cmd == "uptime":
                return run(login, host, cmd)
            if not cmd or "ray start" not in cmd:
                return super().run(cmd, *args, **kwargs)
            run(login, host, STOP.format(node=shlex.quote(self.node_id)))
            said = super().run(cmd, *args, **kwargs)
        except Exception as error:
            self.provider.note(self.node_id, str(error) if isinstance(error, SshError) else f"{host}: {FAILED}")
            raise
        self.provider.note(self.node_id, "")
        return said

    def run_rsync_up(self, source: str, target: str, options: dict[str, Any] | None = None) -> None:
        """A file, or what a folder holds, readable by its owner alone."""
        self._set_ssh_ip_if_required()
        where = Path(source)
        place = target.rstrip("/") if target.startswith("~/") else shlex.quote(target.rstrip("/"))
        if where.is_dir():
            archive = subprocess.run(["tar", "-C", source, "-cf", "-", "."], capture_output=True, check=True).stdout
            command = f"umask 077; mkdir -p {place} && tar -C {place} -xf -"
        else:
            archive = where.read_bytes()
            command = f"umask 077; rm -f {place} && cat > {place}"
        try:
            run(Login(self.ssh_user, self.ssh_private_key), str(self.ssh_ip), command, data=archive)
        except SshError as error:
            raise click.ClickException(str(error)) from None


def _wake(store: str, command: str) -> None:
    """Once; whether it helped, ssh shows."""
    done = subprocess.run(command, shell=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=300)
    if done.returncode:
        log.warning("%s: `%s` failed with code %d", store, command, done.returncode)
