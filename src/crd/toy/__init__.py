"""Problems small enough to be solved in closed form, to check the objectives against (docs/closed-form.md)."""
