"""What a model or a recipe would take, asked before anything is loaded."""
