"""Input formats: tables, folders, tars, COCO, Parquet and Arrow."""
