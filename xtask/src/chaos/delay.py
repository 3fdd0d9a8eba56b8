"""Passes Ethernet frames between two interfaces, each after so many milliseconds: delay.py A B MS.

The order of frames is kept. Ends when it is killed.
"""

import collections
import select
import socket
import struct
import sys
import time

OUTGOING = 4  # Frames that the machine itself put on the interface.
SOL_PACKET, ADD_MEMBERSHIP, PROMISCUOUS = 263, 1, 1
ALL_PROTOCOLS = 3
FRAME_MAX = 65536
BURST_MAX = 64


def tap(name):
    link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL_PROTOCOLS))
    link.bind((name, ALL_PROTOCOLS))
    index = socket.if_nametoindex(name)
    link.setsockopt(SOL_PACKET, ADD_MEMBERSHIP, struct.pack("iHH8s", index, PROMISCUOUS, 0, b""))
    link.setblocking(False)
    return link


def take(link, to, due, waiting):
    for _ in range(BURST_MAX):
        try:
            frame, meta = link.recvfrom(FRAME_MAX)
        except OSError:
            return
        if meta[2] != OUTGOING:
            waiting.append((due, to, frame))


def main(name_a, name_b, ms):
    a, b = tap(name_a), tap(name_b)
    other = {a: b, b: a}
    waiting = collections.deque()  # All wait equally long, so the first is due first.
    print("ready", flush=True)
    while True:
        patience = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        ready, _, _ = select.select([a, b], [], [], patience)
        now = time.monotonic()
        for link in ready:
            take(link, other[link], now + ms / 1e3, waiting)
        while waiting and waiting[0][0] <= now:
            _, to, frame = waiting.popleft()
            try:
                to.send(frame)
            except OSError:
                pass  # The link is full or gone: the frame is lost, as on a wire.


main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
