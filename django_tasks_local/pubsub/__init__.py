"""
The in-process publish/subscribe hub: the latest event of every task.

    publisher's thread                 the hub                      subscriber
    ------------------                 -------                      ----------
    record changes its state --> [topic: latest event of one task]
    (or hub.publish(event))            |  mark the topic as changed,
                                       |  once per mailbox
                                       v
                                   [mailbox] --- one wake-up ---> event loop: mailbox.deliver()
                                                                     |  to each subscription
                                                                     v
                                                                  subscription.atake() / async for
                                   [mailbox] --- one token -----> a thread in subscription.take()

There is one topic per task and one mailbox per event loop (or per reading thread). So the cost of a
publication does not grow with the number of subscriptions of a loop, and nothing can overflow: a
slow subscription reads the latest event from the topic.

`latest` holds the topics, `mailbox` and `subscription` the way to a reader, `facade` the Hub. The
only locks are those of topics. They are re-entrant, because a finalizer (`__del__`) may publish
while its thread holds one. Inside of a topic's lock only the lock of a topic that waits for the
same id is taken.
"""

from .facade import Hub, HubStatistics, hub

__all__ = ["Hub", "HubStatistics", "hub"]
