"""What DVC needs of us: params and their schema, stages and what code they run, files, the cells of a plan."""
