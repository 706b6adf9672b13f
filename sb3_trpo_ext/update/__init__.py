"""One update on one rollout: between the policies of Stable-Baselines3 and the mathematics."""
