from tilestack.kernels.sort_routes.op import Routes, sort_routes

__all__ = ["Routes", "sort_routes"]
