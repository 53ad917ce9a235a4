"""`octavo bench`: measurements that anyone can repeat on a machine of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import bench_kv_cache, bench_roofline, bench_serve

if TYPE_CHECKING:
    from . import Subcommands


def add_parser(commands: Subcommands) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure: the K/V cache's gain, a server under load, the distance to the machine's limits",
        description="Measurements that anyone can repeat on a machine of their own.",
    )
    measurements = parser.add_subparsers(required=True, metavar="MEASUREMENT")
    for measurement in (bench_kv_cache, bench_serve, bench_roofline):
        measurement.add_parser(measurements)
