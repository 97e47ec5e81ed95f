"""The dashboard that jobs are submitted to: whether it answers, to whom, and of which version it is."""

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from cifar.doctor.finding import Finding, ok, problem, warning
from cifar.machine import is_loopback

SECONDS = 5.0


class Answer(NamedTuple):
    status: int
    """Of HTTP; 0: there was none."""
    body: str


def check_dashboard(address: str, environment: Mapping[str, str], own_version: str) -> list[Finding]:
    """Ask the dashboard at this http(s) address, without the token and with it. `own_version` is Ray's, here."""
    without = ask(address, "")
    if not without.status:
        return [
            problem(
                "address",
                f"{address}: no dashboard answers ({without.body}); is the cluster up, and the tunnel to it "
                "(`ray dashboard FILE.yaml`, `kubectl port-forward`, or ssh -L 8265:127.0.0.1:8265)?",
            )
        ]
    found = [exposure(address, without.status)]
    answer = without
    if without.status in (401, 403):
        token, where = find_token(environment)
        if not token:
            return [
                *found,
                problem(
                    "token", f"{address} wants one, and there is none here; put the cluster's into ~/.ray/auth_token"
                ),
            ]
        found += check_file(where)
        if environment.get("RAY_AUTH_MODE") != "token":
            found.append(problem("token", f"{where} is not sent by itself; export RAY_AUTH_MODE=token"))
        answer = ask(address, token)
        if answer.status in (401, 403):
            return [*found, problem("token", f"{where} is not this cluster's; put the cluster's there")]
        found.append(ok("token", f"{where} is accepted"))
    return [*found, check_version(address, answer, own_version)]


def exposure(address: str, status: int) -> Finding:
    """Who may run code there, by the answer to somebody who has no token."""
    host = urlsplit(address).hostname or ""
    if status in (401, 403):
        if urlsplit(address).scheme == "http" and not is_loopback(host):
            return warning(
                "dashboard",
                f"{address} sends the token in clear text; use a tunnel to it, such as ssh -L or `ray dashboard`",
            )
        return ok("dashboard", f"{address} answers nobody without the token")
    told = "everybody on this machine" if is_loopback(host) else "everybody who reaches it"
    level = warning if is_loopback(host) else problem
    return level("dashboard", f"{address} lets {told} run code; start the cluster with RAY_AUTH_MODE=token")


def check_version(address: str, answer: Answer, own_version: str) -> Finding:
    try:
        version = str(json.loads(answer.body)["ray_version"])
    except (ValueError, KeyError, TypeError):
        return problem("address", f"{address}: what answers there is no Ray dashboard (HTTP {answer.status})")
    if version != own_version:
        return problem("Ray", f"the cluster has {version}, this machine {own_version}; install the same on both")
    return ok("Ray", f"{version} there and here")


def find_token(environment: Mapping[str, str]) -> tuple[str, str]:
    """The token that Ray would take, and where it is from; empty if there is none."""
    if token := environment.get("RAY_AUTH_TOKEN", "").strip():
        return token, "RAY_AUTH_TOKEN"
    path = Path(environment.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    try:
        return path.read_text().strip(), str(path)
    except OSError:
        return "", str(path)


def check_file(where: str) -> list[Finding]:
    """Nothing, or that others may read the token."""
    try:
        mode = stat.S_IMODE(os.stat(where).st_mode)
    except OSError:  # it is from the environment
        return []
    if mode & 0o077:
        return [warning("token", f"others on this machine may read {where}; chmod 600 {where}")]
    return []


def ask(address: str, token: str) -> Answer:
    request = Request(f"{address.rstrip('/')}/api/version")
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urlopen(request, timeout=SECONDS) as response:
            return Answer(response.status, response.read(1 << 16).decode(errors="replace"))
    except HTTPError as error:
        return Answer(error.code, "")
    except (URLError, OSError, ValueError) as error:
        return Answer(0, str(getattr(error, "reason", error)))
