"""Hub repositories: cards filled from results/ and configs, folders assembled, checked, uploaded and read back."""
