def list_jobs(part, settings, report):
    return [], None
