"The command line, the report, the panels and the course."
