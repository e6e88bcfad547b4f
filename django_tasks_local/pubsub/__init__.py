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

`latest` holds the topics, `delivery` the mailboxes and subscriptions, `facade` the Hub. The only
lock is that of a topic. It is re-entrant, because a finalizer (`__del__`) may publish while its
thread holds it, and no other lock of this package is taken inside of it.
"""

from .facade import Hub, HubStatistics, hub

__all__ = ["Hub", "HubStatistics", "hub"]
