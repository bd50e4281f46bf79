/**
 * Makes docs/faults.md of what test/e2e/faults has seen.
 *
 *   KILN_FAULT_REPORT=$PWD/.cache/test/faults.json npm test -- test/e2e/faults
 *   scripts/faults-page .cache/test/faults.json
 */
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import {
  cellName,
  type FaultReport,
  faultNotes,
  parts,
  readReport,
  stopMs,
  testedCells,
} from '../test/support/fault-matrix.ts';

const about: Readonly<Record<(typeof parts)[number], string>> = {
  kilnd: 'The relays keep containerd’s connections and start the next kilnd, which takes the containers over.',
  QEMU: 'One per container: a fault is that container’s alone. The full disk is the one with the writable layers.',
  'vhost-device-vsock': 'One per container: the way between kilnd and the agent.',
  agent: 'The program in the guest; its end is the virtual machine’s. The full disk is /run of the guest.',
  crun: 'In the guest, for moments: at Create, each exec and, in a pod, Delete.',
  containerd: 'Started again by the test, as a service manager would. Its full disk is the one with its root folder.',
};

const introduction = `# Faults

What a user sees when a part of Kiln fails. The tests \`test/e2e/faults*.test.ts\` make each part fail in each phase of a container's
life, on containerd 2.1, and this page is made of what they saw: change the test, not the page.

- **SIGKILL**: the process is killed. **SIGSTOP**: it is stopped for ${stopMs / 1000} s, which is longer than containerd waits for a State,
  then it goes on. **disk full**: no space where it writes.
- Phases are reached by what happens in them, not by time: **Create** in a \`createRuntime\` hook on the host (the virtual
  machine runs, its container is not made yet), **Start** in a \`poststart\` hook on the host and, when it begins, in a
  \`startContainer\` hook in the guest too (the program does not run yet), **Delete** in a \`poststop\` hook, or, for what is gone by then, while output that nobody
  has read holds the virtual machine. A stop of ${stopMs / 1000} s is in the time of its row.
- "took" is the time from the fault to the answer, on two cores under emulation; "limit" is what the test allows.
- After each case nothing is left: no process, mount, socket, file, namespace, control group, loop device or open file; and
  new containers start.`;

const howto = `## Make this page again

\`\`\`sh
KILN_FAULT_REPORT=$PWD/.cache/test/faults.json npm test -- test/e2e/faults
scripts/faults-page .cache/test/faults.json
\`\`\`

A unit test compares the page with the list of cases in \`test/support/fault-matrix.ts\`.
`;

function cell(text: string): string {
  return text.replaceAll('|', '\\|').replaceAll('\n', ' ');
}

export function pageOf(report: FaultReport): string {
  const rows = new Map(report.rows.map((row) => [cellName(row), row]));
  const missing = testedCells().filter((tested) => !rows.has(cellName(tested)));
  if (missing.length > 0) throw new Error(`the report lacks ${missing.map(cellName).join('; ')}`);
  const sections = parts.map((part) => {
    const tested = testedCells().filter((one) => one.part === part);
    const lines = tested.flatMap((one) => {
      const row = rows.get(cellName(one));
      if (row === undefined) return [];
      const code = row.code === undefined ? '' : String(row.code);
      return `| ${[one.fault, one.phase, cell(row.saw), code, `${row.seconds} s`, `${row.withinSeconds} s`].join(' | ')} |`;
    });
    const notes = faultNotes.filter((one) => one.part === part);
    return [
      `## ${part}`,
      about[part],
      [
        '| fault | during | what the user sees | `ctr` ends with | took | limit |',
        '| --- | --- | --- | --- | --- | --- |',
        ...lines,
      ].join('\n'),
      notes.map(({ fault, phases, why }) => `- ${fault}, ${phases.join(', ')}: ${why}.`).join('\n'),
    ].filter(Boolean);
  });
  const { takeover } = report;
  if (takeover === undefined) throw new Error('the report lacks the figures of the takeover');
  const { containers, medianMs, maxMs } = takeover;
  const figures = `## kilnd killed with ${containers} running containers

All write output while kilnd gets SIGKILL. None is lost, every line arrives (what was delivered at that moment may come
twice), and their agents answer again ${medianMs} ms (median) and ${maxMs} ms (the last) after the kill.`;
  return [introduction, ...sections.flat(), figures, howto].join('\n\n');
}

const [file] = process.argv.slice(2);
if (file === undefined) throw new Error('usage: scripts/faults-page REPORT');
writeFileSync(join(import.meta.dirname, '..', 'docs', 'faults.md'), pageOf(readReport(file)));
