//! The one table printer: text left, numbers right, at most 100 columns.

/// Rows of text under heads; a column whose cells all look like numbers is right-aligned.
#[derive(Debug, Clone)]
pub struct Table {
    heads: Vec<String>,
    rows: Vec<Vec<String>>,
}

const WIDTH: usize = 100;
const GAP: &str = "  ";

impl Table {
    /// An empty table; units stand in the heads.
    pub fn new(heads: &[&str]) -> Self {
        Self {
            heads: heads.iter().map(|h| (*h).to_owned()).collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row; missing cells stay empty, cells beyond the heads are dropped.
    pub fn row<S: Into<String>>(&mut self, cells: impl IntoIterator<Item = S>) -> &mut Self {
        let mut cells: Vec<String> = cells.into_iter().map(Into::into).collect();
        cells.resize(self.heads.len(), String::new());
        self.rows.push(cells);
        self
    }

    /// The table as lines, each with a newline.
    pub fn render(&self) -> String {
        let columns = self.heads.len();
        let mut widths: Vec<usize> = (0..columns)
            .map(|c| {
                self.rows
                    .iter()
                    .map(|row| &row[c])
                    .chain([&self.heads[c]])
                    .map(|cell| cell.chars().count())
                    .max()
                    .unwrap_or(0)
            })
            .collect();
        // Too wide: the widest column gives way, its cells end in an ellipsis.
        while widths.iter().sum::<usize>() + GAP.len() * columns.saturating_sub(1) > WIDTH {
            let Some(widest) = (0..columns).max_by_key(|&c| widths[c]).filter(|&c| widths[c] > 8) else {
                break;
            };
            widths[widest] -= 1;
        }
        let is_number: Vec<bool> = (0..columns)
            .map(|c| {
                self.rows.iter().all(|row| {
                    row[c].is_empty() || row[c].starts_with(|x: char| x.is_ascii_digit() || "+-−±".contains(x))
                })
            })
            .collect();
        let mut text = String::new();
        let rule: Vec<String> = widths.iter().map(|&w| "─".repeat(w)).collect();
        for cells in [&self.heads, &rule].into_iter().chain(&self.rows) {
            let mut line = String::new();
            for (c, cell) in cells.iter().enumerate() {
                let cell = cut(cell, widths[c]);
                let pad = " ".repeat(widths[c] - cell.chars().count());
                if c > 0 {
                    line.push_str(GAP);
                }
                if is_number[c] {
                    line += &pad;
                    line += &cell
                } else {
                    line += &cell;
                    line += &pad
                }
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

fn cut(cell: &str, width: usize) -> String {
    if cell.chars().count() <= width {
        return cell.to_owned();
    }
    cell.chars().take(width.saturating_sub(1)).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stand_right_text_left() {
        let mut table = Table::new(&["name", "bytes"]);
        table.row(["a", "5"]).row(["long name", "1234"]);
        assert_eq!(
            table.render(),
            "name       bytes\n─────────  ─────\na              5\nlong name   1234\n"
        );
    }

    #[test]
    fn a_table_never_passes_100_columns() {
        let mut table = Table::new(&["path", "value"]);
        table.row(["x".repeat(300), "1".to_owned()]);
        assert!(table.render().lines().all(|line| line.chars().count() <= 100));
    }
}
