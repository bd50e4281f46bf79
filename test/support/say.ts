/** A script's answers as rows: what the inside of a container sees of each word of a spec. */

/** A shell function `say KEY COMMAND…`, which writes what the command says as one row. */
export const say = 'say() { k=$1; shift; printf "%s\\t%s\\n" "$k" "$("$@" 2>&1 | tr "\\n\\t" "| ")"; }\n';

/** The rows by their keys; `|` stands for the ends of lines. */
export function parse(stdout: Buffer): Map<string, string> {
  const rows = stdout.toString().split('\n').filter(Boolean);
  return new Map(rows.map((row) => [row.split('\t')[0] ?? '', (row.split('\t')[1] ?? '').replace(/\|$/, '')]));
}

/** A line `Name: value` of a file of /proc. */
export const field = (text: string | undefined, name: string): string =>
  new RegExp(`(?:^|\\|)${name}:? +([^|]*)`).exec(text ?? '')?.[1]?.trim() ?? '';
