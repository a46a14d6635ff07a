//! The calendar, for templates that print the date (`strftime_now`) and for `created` in replies. UTC.

use std::time::{SystemTime, UNIX_EPOCH};

/// Seconds since 1970.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// The time in the form of C's `strftime`; letters that it does not know stay as they are.
pub(crate) fn format_now(format: &str) -> String {
    format_at(unix_seconds(), format)
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = [
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
];

fn format_at(seconds: u64, format: &str) -> String {
    let (day, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day_of_month, day_of_year) = date(day);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    let weekday = DAYS[(day % 7) as usize];
    let month_name = MONTHS[month - 1];
    let mut out = String::new();
    let mut letters = format.chars();
    while let Some(letter) = letters.next() {
        if letter != '%' {
            out.push(letter);
            continue;
        }
        match letters.next() {
            Some('Y') => out += &year.to_string(),
            Some('y') => out += &format!("{:02}", year % 100),
            Some('m') => out += &format!("{month:02}"),
            Some('d') => out += &format!("{day_of_month:02}"),
            Some('e') => out += &format!("{day_of_month:2}"),
            Some('j') => out += &format!("{day_of_year:03}"),
            Some('B') => out += month_name,
            Some('b' | 'h') => out += &month_name[..3],
            Some('A') => out += weekday,
            Some('a') => out += &weekday[..3],
            Some('H') => out += &format!("{hour:02}"),
            Some('I') => out += &format!("{:02}", (hour + 11) % 12 + 1),
            Some('M') => out += &format!("{minute:02}"),
            Some('S') => out += &format!("{:02}", second % 60),
            Some('p') => out += if hour < 12 { "AM" } else { "PM" },
            Some('F') => out += &format!("{year}-{month:02}-{day_of_month:02}"),
            Some('T') => out += &format!("{hour:02}:{minute:02}:{:02}", second % 60),
            Some('Z') => out += "UTC",
            Some('%') => out.push('%'),
            Some(other) => {
                out.push('%');
                out.push(other);
            }
            None => out.push('%'),
        }
    }
    out
}

/// Year, month and day from 1, day of the year from 1: of the day that is `days` after 1 January 1970.
fn date(mut days: u64) -> (u64, usize, u64, u64) {
    let is_leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970;
    loop {
        let length = if is_leap(year) { 366 } else { 365 };
        if days < length {
            break;
        }
        days -= length;
        year += 1;
    }
    let day_of_year = days + 1;
    let february = if is_leap(year) { 29 } else { 28 };
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    (year, month, days + 1, day_of_year)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        let form = "%A %d %B %Y %H:%M:%S %j %I%p %b";
        assert_eq!(format_at(0, form), "Thursday 01 January 1970 00:00:00 001 12AM Jan");
        assert_eq!(
            format_at(951_827_696, form),
            "Tuesday 29 February 2000 12:34:56 060 12PM Feb"
        );
        assert_eq!(
            format_at(1_798_761_599, form),
            "Thursday 31 December 2026 23:59:59 365 11PM Dec"
        );
        assert_eq!(format_at(0, "%q %%"), "%q %");
    }
}
