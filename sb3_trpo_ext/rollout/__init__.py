"""From environments to a full rollout buffer."""
