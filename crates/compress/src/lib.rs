//! The compression pipeline: calibration stream, statistics, stages, allocation, build, report.
