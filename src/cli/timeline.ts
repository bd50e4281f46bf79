import { Command, Option } from 'commander';
import { ask } from './ask.ts';
import { drawHtml, drawText, type NamedTimeline } from './waterfall.ts';

interface TimelineOptions {
  readonly namespace: string;
  readonly json?: true;
  readonly html?: true;
}

/** `kiln timeline ID`: where the time of a container's start and end went. */
export function timelineCommand(): Command {
  return new Command('timeline')
    .description("show when what happened in a container's start and end; of the containers that kilnd started last")
    .argument('<id>', "the container's id")
    .option('-n, --namespace <name>', "containerd's namespace", 'default')
    .addOption(new Option('--json', 'as JSON').conflicts('html'))
    .addOption(new Option('--html', 'as one self-contained page'))
    .action(async (id: string, { namespace, json, html }: TimelineOptions) => {
      const answer = Buffer.from(await ask({ kind: 'timeline', namespace, id })).toString();
      if (json) process.stdout.write(answer);
      else process.stdout.write((html ? drawHtml : drawText)(JSON.parse(answer) as NamedTimeline));
    });
}
