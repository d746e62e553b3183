"""What a search hands to Ray Tune."""

from __future__ import annotations

import pytest

from tests.support.cluster import import_ray

import_ray()

from medlora.on_ray.tune_search import keep_secrets_out_of_logs  # noqa: E402


def test_no_key_of_the_drivers_environment_reaches_a_runtime_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray logs runtime environments in plain text, and Tune would copy these there."""
    from ray.tune.execution import class_cache

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "secret-canary")
    keep_secrets_out_of_logs()
    asked: list[object] = []
    monkeypatch.setattr("ray.remote", lambda **options: asked.append(options) or (lambda cls: cls))
    class_cache._ActorClassCache().get(object)
    assert asked and "secret-canary" not in str(asked)
