"""Risk: a topic that can lose acknowledged events, or that cannot take them, is accepted for ever."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from wallet_core.event_log import StoreUnusable, kafka
from wallet_core.event_log.kafka import TOPIC, KafkaLogConfig, ensure_topic

SAFE = {
    "cleanup.policy": "delete",
    "retention.ms": "-1",
    "retention.bytes": "-1",
    "min.insync.replicas": "2",
    "unclean.leader.election.enable": "false",
    "message.timestamp.type": "CreateTime",
    "max.message.bytes": "1048588",
}


def cluster(
    monkeypatch: pytest.MonkeyPatch, *, brokers: int = 3, replicas: int = 3, rules: dict[str, str] | None = None
) -> None:
    """Brokers that already have the topic, with one partition."""

    class Admin:
        def __init__(self, config: object) -> None:
            pass

        def list_topics(self, *args: object, **options: object) -> object:
            partition = SimpleNamespace(replicas=list(range(replicas)), leader=0)
            topics = {TOPIC: SimpleNamespace(partitions={0: partition})}
            return SimpleNamespace(brokers=dict.fromkeys(range(brokers)), topics=topics)

        def describe_configs(self, resources: list[Any], **options: object) -> dict[Any, Future[Any]]:
            found: Future[Any] = Future()
            values = {**SAFE, **(rules or {})}
            found.set_result({name: SimpleNamespace(value=value) for name, value in values.items()})
            return {resources[0]: found}

    monkeypatch.setattr(kafka, "AdminClient", Admin)


def test_a_safe_topic_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch)
    ensure_topic(KafkaLogConfig("brokers:9092"), 1)
    cluster(monkeypatch, brokers=1, replicas=1, rules={"min.insync.replicas": "1"})
    ensure_topic(KafkaLogConfig("brokers:9092"), 1)


def test_a_topic_made_while_only_one_of_three_brokers_was_up_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, replicas=1, rules={"min.insync.replicas": "1"})
    with pytest.raises(StoreUnusable, match=r"1 replicas, it must have 2.*min\.insync\.replicas is 1, it must be 2"):
        ensure_topic(KafkaLogConfig("brokers:9092"), 1)
    ensure_topic(KafkaLogConfig("brokers:9092", min_insync_replicas=1), 1)  # somebody said that one is enough


@pytest.mark.parametrize(
    ("rule", "value"), [("message.timestamp.type", "LogAppendTime"), ("max.message.bytes", "917504")]
)
def test_a_topic_that_changes_or_refuses_records_is_refused(
    monkeypatch: pytest.MonkeyPatch, rule: str, value: str
) -> None:
    cluster(monkeypatch, rules={rule: value})
    with pytest.raises(StoreUnusable, match=f"{rule} is {value}"):
        ensure_topic(KafkaLogConfig("brokers:9092"), 1)
