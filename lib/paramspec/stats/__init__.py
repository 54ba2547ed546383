"""Statistics of measured tables: trends over models, contrasts, intervals."""
