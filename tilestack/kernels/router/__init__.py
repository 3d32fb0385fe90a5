from tilestack.kernels.router.op import RouterOutput, load_balancing_loss, router

__all__ = ["RouterOutput", "load_balancing_loss", "router"]
