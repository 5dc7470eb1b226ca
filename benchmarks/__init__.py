"""Benchmarks: what SGD and the flow cost, measured beside the ways one would write them instead."""
