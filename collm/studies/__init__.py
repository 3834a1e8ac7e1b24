"""Methods x tasks x seeds as a library: recipes, jobs and the numbers of their runs. Nothing here draws or imports torch."""
