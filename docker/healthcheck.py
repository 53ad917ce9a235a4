"""HEALTHCHECK of the image: exits with 0 while /ready answers 200, else with 1 and the reason in one line.

Standard library only, since slim images have no curl; http.client, because it asks no proxy of the environment.
"""

from __future__ import annotations

import http.client
import json
import os
import sys

TIMEOUT_S = 4


def main() -> int:
    # Kubernetes puts tcp://… into OCTAVO_PORT beside a Service named octavo; the server ignores that as well.
    port = os.environ.get("OCTAVO_PORT", "")
    connection = http.client.HTTPConnection("127.0.0.1", int(port) if port.isdigit() else 8000, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/ready")
        response = connection.getresponse()
        reason = json.loads(response.read()).get("reason", "")
    except (OSError, http.client.HTTPException, ValueError) as error:
        print(f"no answer: {error}")
        return 1
    print(reason or "ready")
    return 0 if response.status == 200 else 1


if __name__ == "__main__":
    sys.exit(main())
