"""The benchmark suite: peers in processes of their own, interleaved, compared with a baseline."""
