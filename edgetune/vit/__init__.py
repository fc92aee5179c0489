"""The only room that knows timm: models by name (`models`) and the one loop that trains them (`loop`)."""
