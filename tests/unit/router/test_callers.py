"""Who asks, with which promise and which hints."""

from __future__ import annotations

import math

import msgspec
import pytest

from mooncake_connector.router.answers import Problem
from mooncake_connector.router.callers import Caller, find_tenant, read_caller
from mooncake_connector.router.config import Tenant

TENANTS = {"acme": Tenant(api_key="key-of-acme"), "zoo": Tenant(api_key="key-of-zoo-2", service_class="free")}
CLASSES = ("paid", "free")


def read(headers: dict[str, str], body: str = "{}", **options: str) -> Caller | Problem:
    fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    return read_caller(headers, fields, classes=CLASSES, **options)


@pytest.mark.parametrize(
    ("authorization", "name"),
    [
        ("Bearer key-of-acme", "acme"),
        ("bearer  key-of-zoo-2 ", "zoo"),
        ("Bearer key-of-acm", None),
        ("Basic key-of-acme", None),
        ("key-of-acme", None),
        ("Bearer clé", None),
        ("", None),
    ],
)
def test_a_key_names_its_tenant(authorization: str, name: str | None) -> None:
    assert find_tenant(TENANTS, authorization) == name


def test_nobody_said_anything() -> None:
    caller = read({})
    assert caller == Caller() and caller.hints.ttft_s == math.inf


def test_headers_come_before_the_body_and_a_key_before_both() -> None:
    body = '{"user": "u1", "service_tier": "free"}'
    assert read({}, body)[:2] == ("u1", "free")
    assert read({"x-mooncake-class": "paid", "x-mooncake-tenant": "t1"}, body)[:2] == ("t1", "paid")
    asked = {"x-mooncake-class": "paid", "x-mooncake-tenant": "t1"}
    assert read(asked, body, tenant="zoo", tenant_class="free")[:2] == ("zoo", "free")


@pytest.mark.parametrize("body", ['{"user": 7}', '{"user": null, "service_tier": ["x"]}', '{"service_tier": "auto"}'])
def test_what_the_body_says_otherwise_is_the_engines_business(body: str) -> None:
    assert read({}, body) == Caller()


def test_hints() -> None:
    caller = read({"x-mooncake-ttft-target-ms": "1500", "x-mooncake-priority": "-2", "x-mooncake-output-tokens": "64",
                   "x-mooncake-expected-reuses": "3"})  # fmt: skip
    assert isinstance(caller, Caller)
    hints = caller.hints
    assert (hints.ttft_s, hints.priority, hints.num_output_tokens, hints.num_reuses) == (1.5, -2, 64, 3)


@pytest.mark.parametrize(
    "headers",
    [
        {"x-mooncake-class": "gold"},
        {"x-mooncake-ttft-target-ms": "soon"},
        {"x-mooncake-ttft-target-ms": "nan"},
        {"x-mooncake-ttft-target-ms": "-1"},
        {"x-mooncake-priority": "9"},
        {"x-mooncake-priority": "1.5"},
        {"x-mooncake-output-tokens": "0"},
        {"x-mooncake-output-tokens": "1e99"},
    ],
    ids=str,
)
def test_a_header_that_cannot_be_honoured_is_refused_by_name(headers: dict[str, str]) -> None:
    problem = read(headers)
    assert isinstance(problem, Problem) and problem.status == 400
    assert next(iter(headers)) in problem.message
