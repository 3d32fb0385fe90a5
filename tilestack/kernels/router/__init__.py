from tilestack.kernels.router.op import RouterOutput, load_balancing_loss, router, router_z_loss

__all__ = ["RouterOutput", "load_balancing_loss", "router", "router_z_loss"]
