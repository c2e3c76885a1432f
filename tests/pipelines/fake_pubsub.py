"""A Pub/Sub service in this process: what the real client and Beam's real reader speak to over gRPC, on loopback.

with serve() as service:          # sets nothing; give service.address as PUBSUB_EMULATOR_HOST
    service.publish(b"…", published="2024-07-01T00:00:00Z")
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
from google.protobuf import empty_pb2
from google.pubsub_v1 import types

TOPIC = "projects/some-project/topics/some-topic"
SUBSCRIPTION = "projects/some-project/subscriptions/some-name"


class PubSub:
    """One topic with one subscription.

    Attributes:
        waiting: messages to deliver. outstanding: delivered and not acknowledged, by ack id. acknowledged: message ids.
        renewed: ack ids of all requests for more time. failures: gRPC codes to answer the next pulls with.
        patience: seconds that a pull waits for a message.
    """

    def __init__(self) -> None:
        self.waiting: list[types.PubsubMessage] = []
        self.outstanding: dict[str, types.PubsubMessage] = {}
        self.acknowledged: list[str] = []
        self.renewed: list[str] = []
        self.failures: list[grpc.StatusCode] = []
        self.pulls = 0
        self.patience = 0.1
        self.address = ""
        self._numbers = itertools.count(1)
        self._changed = threading.Condition()

    def publish(self, data: bytes, **attributes: str) -> str:
        """Publish one message; returns its id."""
        with self._changed:
            number = str(next(self._numbers))
            message = types.PubsubMessage(data=data, attributes=attributes, message_id=number)
            message.publish_time = {"seconds": 1_800_000_000}
            self.waiting.append(message)
            self._changed.notify_all()
            return number

    def redeliver(self) -> None:
        """All leases run out."""
        with self._changed:
            self.waiting += self.outstanding.values()
            self.outstanding.clear()
            self._changed.notify_all()

    # ------------------------------------------------------------------------------------------------ the service

    def Pull(self, request, context):
        with self._changed:
            self.pulls += 1
            if self.failures:
                context.abort(self.failures.pop(0), "as the test asked")
            # A client whose deadline passed is gone: what it was handed would come again after its lease only.
            self._changed.wait_for(lambda: self.waiting or not context.is_active(), timeout=self.patience)
            if not context.is_active():
                return types.PullResponse()
            taken, self.waiting = self.waiting[: request.max_messages], self.waiting[request.max_messages :]
            received = []
            for message in taken:
                ack_id = f"ack-{next(self._numbers)}"
                self.outstanding[ack_id] = message
                received.append(types.ReceivedMessage(ack_id=ack_id, message=message))
            return types.PullResponse(received_messages=received)

    def Acknowledge(self, request, context):
        with self._changed:
            self.acknowledged += [
                self.outstanding.pop(one).message_id for one in request.ack_ids if one in self.outstanding
            ]
            return empty_pb2.Empty()

    def ModifyAckDeadline(self, request, context):
        with self._changed:
            self.renewed += request.ack_ids
            return empty_pb2.Empty()

    def GetSubscription(self, request, context):
        if request.subscription != SUBSCRIPTION:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such subscription")
        return types.Subscription(name=SUBSCRIPTION, topic=TOPIC)

    def Publish(self, request, context):
        ids = [self.publish(bytes(one.data), **dict(one.attributes)) for one in request.messages]
        return types.PublishResponse(message_ids=ids)


_SUBSCRIBER = {
    "Pull": (types.PullRequest, types.PullResponse),
    "Acknowledge": (types.AcknowledgeRequest, empty_pb2.Empty),
    "ModifyAckDeadline": (types.ModifyAckDeadlineRequest, empty_pb2.Empty),
    "GetSubscription": (types.GetSubscriptionRequest, types.Subscription),
}
_PUBLISHER = {"Publish": (types.PublishRequest, types.PublishResponse)}


def _serialize(message) -> bytes:
    return message.SerializeToString() if isinstance(message, empty_pb2.Empty) else type(message).serialize(message)


def _handlers(service: str, methods, state: PubSub):
    found = {
        name: grpc.unary_unary_rpc_method_handler(
            getattr(state, name), request_deserializer=request.deserialize, response_serializer=_serialize
        )
        for name, (request, _) in methods.items()
    }
    return grpc.method_handlers_generic_handler(f"google.pubsub.v1.{service}", found)


@contextmanager
def serve() -> Iterator[PubSub]:
    """Run the service on a free port."""
    state = PubSub()
    server = grpc.server(ThreadPoolExecutor(8))
    server.add_generic_rpc_handlers(
        (_handlers("Subscriber", _SUBSCRIBER, state), _handlers("Publisher", _PUBLISHER, state))
    )
    state.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield state
    finally:
        server.stop(None).wait(5)
