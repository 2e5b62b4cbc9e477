"""Two Ray nodes of one CPU each on this machine, and on them `serve run CONFIG`, until it is interrupted:
`RAY_TMPDIR=FOLDER python cluster_of_two.py CONFIG`."""

import sys

import ray
from ray.cluster_utils import Cluster
from ray.serve.scripts import cli

if __name__ == "__main__":
    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    cluster.add_node(**node)
    ray.init(address=cluster.address, namespace="serve", log_to_driver=False)
    try:
        cli(["run", sys.argv[1]], standalone_mode=False)
    finally:
        ray.shutdown()
        cluster.shutdown()
