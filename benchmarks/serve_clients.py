"""
The clients of serve.py: threads that send one search after the other to a loopback port. In a process of their own and with
nothing but the standard library, so that they take as little as possible from the server.

Reads one JSON object from standard input and writes one to standard output.
"""

import http.client
import json
import sys
import threading
import time

# What a client that was refused waits before it tries again, shorter than the server asks for.
PAUSE = 0.1


def run_client(number, order, until, answers):
    connection = http.client.HTTPConnection("127.0.0.1", order["port"], timeout=60)
    turn = number
    while (started := time.monotonic()) < until:
        body = order["bodies"][turn % len(order["bodies"])]
        turn += order["clients"]
        try:
            connection.request("POST", "/search", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            response.read()
            status = response.status
        except (OSError, http.client.HTTPException):
            connection.close()
            status = 0
        answers.append((status, time.monotonic() - started))
        if status != 200:
            time.sleep(PAUSE)
    connection.close()


def main():
    order, answers = json.load(sys.stdin), []
    started = time.monotonic()
    clients = [
        threading.Thread(target=run_client, args=(number, order, started + order["seconds"], answers))
        for number in range(order["clients"])
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    json.dump({"seconds": time.monotonic() - started, "answers": answers}, sys.stdout)


if __name__ == "__main__":
    main()
