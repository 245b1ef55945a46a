"""The model, its configuration and its cache under the names of the earlier integration."""
