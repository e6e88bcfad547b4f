"""
This package is the in-process publish/subscribe hub, which keeps the latest event of every task.

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
publication does not grow with the number of subscriptions of a loop. No queue of events can grow: a
slow subscription remembers which topics have changed, and reads the latest event of each. Only a
subscription to all tasks has to be limited, because it also remembers tasks that the hub has
released (see UNREAD_LIMIT).

The module `latest` has the topics, `mailbox` and `subscription` bring their events to a reader, and
`facade` has the Hub. A publisher waits only for the lock of a topic. This lock is re-entrant,
because a finalizer (`__del__`) may publish while its thread holds it. A thread that holds the lock
of one topic waits only for the lock of another topic for the same task id. Locks that limit a
clean-up to one thread are tried without waiting.
"""

from .facade import Hub, HubStatistics, hub

__all__ = ["Hub", "HubStatistics", "hub"]
