"""Looking at images, noise and relays: tools that train nothing."""
