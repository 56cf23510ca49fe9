def draw_contact_sheet(records, settings, dataset, points_per_side):
    raise NotImplementedError
