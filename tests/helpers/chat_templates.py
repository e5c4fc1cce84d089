"""Chat templates in the styles of public model families, and conversations to render with them."""

from __future__ import annotations

from typing import Any

TEMPLATES = {
    "chatml": """\
{% for message in messages %}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
""",
    "chatml with a system message of its own": (
        "{%- if messages[0].role == 'system' -%}{%- set system = messages[0].content -%}"
        "{%- set rest = messages[1:] -%}{%- else -%}{%- set system = 'Be brief & kind.' -%}"
        "{%- set rest = messages -%}{%- endif -%}"
        "<|im_start|>system\\n{{ system }}<|im_end|>\\n"
        "{%- for m in rest -%}{{ '\\n<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>' }}"
        "{%- endfor -%}{{ '\\n<|im_start|>assistant\\n' if add_generation_prompt else '' }}"
    ),
    "Llama 2": """\
{% if messages[0]['role'] == 'system' %}
{% set turns = messages[1:] %}{% set system = messages[0]['content'] %}
{% else %}
{% set turns = messages %}{% set system = false %}
{% endif %}
{% for turn in turns %}
{% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles have to take turns: user, assistant, user, …') }}
{% endif %}
{% if loop.index0 == 0 and system != false %}
{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + turn['content'] %}
{% else %}{% set content = turn['content'] %}{% endif %}
{% if turn['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}
{% endfor %}
""",
    "Llama 3": (
        "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + "
        "'<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.first %}{% set content = bos_token + content %}{% endif %}{{ content }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "Llama 3 with the date and tools": """\
{{- bos_token }}
{%- if not date is defined %}
    {%- if strftime_now is defined %}{%- set date = strftime_now("%d %b %Y") %}
    {%- else %}{%- set date = "1 Jan 2000" %}{%- endif %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = "never" %}{%- endif %}
{{- "<|system|>Today: " + date + "\\n" }}
{%- if tools is not none %}{{- "Tools: " + (tools | tojson(indent=4)) }}{%- endif %}
{%- for m in messages %}
    {%- if 'tool_calls' in m %}
        {%- if not m.tool_calls | length == 1 %}
            {{- raise_exception("one call at a time") }}
        {%- endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}
        {{- "}" + eos_token }}
    {%- else %}
        {{- '<|' + m['role'] + '|>' + (m['content'] or '') | trim }}
    {%- endif %}
{%- endfor %}
""",
    "Mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% elif m['role'] == 'assistant' %}"
        "{{ m['content'] + eos_token }}{% else %}"
        "{{ raise_exception('only user and assistant, not ' ~ m['role']) }}{% endif %}{% endfor %}"
    ),
    "Mistral with tools": """\
{%- set ns = namespace(index=0, system='') %}
{%- for m in messages if m.role == 'system' %}{%- set ns.system = m.content %}{%- endfor %}
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == "user" %}
        {%- if tools is not none and loop.last %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}{{- tool | tojson }}{{- ", " if not loop.last }}{%- endfor %}
            {{- "][/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and ns.system %}{{- "[INST] " + ns.system + "\\n\\n" + m.content }}
        {%- else %}{{- "[INST] " + m.content }}{%- endif %}
        {{- "[/INST]" }}
        {%- set ns.index = ns.index + 1 %}
    {%- elif m.role == "assistant" %}
        {{- " " + (m.content | default("", true)) + eos_token }}
    {%- endif %}
{%- endfor %}
{{- "(" ~ ns.index ~ ")" }}
""",
    "Gemma": """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}\
{{ raise_exception('there is no system role') }}{% endif %}
{% for m in messages %}
{% if (m['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = m['role'] %}\
{% endif %}
{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
""",
    "Phi": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + '\\n' + m['content'] + '<|end|>' + "
        "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}"
        "{% else %}{{ eos_token }}{% endif %}"
    ),
    "Zephyr": """\
{% for m in messages %}
{% if m['role'] == 'user' %}
{{ '<|user|>\\n' + m['content'] + eos_token }}
{% elif m['role'] == 'system' %}
{{ '<|system|>\\n' + m['content'] + eos_token }}
{% elif m['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + m['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
""",
    "Qwen with tools": """\
{%- if tools %}
    {{- '# Tools\\n' }}{%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == "assistant" and m.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- for call in m.tool_calls %}
            {%- if call.function is defined %}{%- set call = call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- call.name }}{{- '", "arguments": ' }}
            {{- call.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
    {%- elif m.role == "tool" %}
        {%- if loop.index0 == 0 or messages[loop.index0 - 1].role != "tool" %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\\n' + (m.content or '') + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
""",
    "Qwen that thinks": """\
{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for m in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and m.role == "user" and not m.content.startswith('<tool_response>') %}
        {%- set ns.searching = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- set content = m.content if m.content is string else '' %}
    {%- set thought = '' %}
    {%- if m.reasoning_content is string %}{%- set thought = m.reasoning_content %}
    {%- elif '</think>' in content %}
        {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|' + m.role + '|>' }}
    {%- if thought and loop.index0 > ns.last %}{{- '<think>' + thought + '</think>' }}{%- endif %}
    {{- content }}
{%- endfor %}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>' }}{%- endif %}
""",
    "DeepSeek": (
        "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}"
        "{% endif %}{% set ns = namespace(is_first=false, system_prompt='') %}"
        "{%- for m in messages %}{%- if m['role'] == 'system' %}"
        "{% set ns.system_prompt = m['content'] %}{%- endif %}{%- endfor %}"
        "{{bos_token}}{{ns.system_prompt}}{%- for m in messages %}{%- if m['role'] == 'user' %}"
        "{{'<｜User｜>' + m['content']}}{%- endif %}{%- if m['role'] == 'assistant' and "
        "m['content'] is not none %}{% set content = m['content'] %}{% if '</think>' in content %}"
        "{% set content = content.split('</think>')[-1] %}{% endif %}"
        "{{'<｜Assistant｜>' + content + eos_token}}{%- endif %}{%- endfor -%}"
        "{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"
    ),
    "Command with documents": """\
{%- macro turn(role, content) -%}
<|START|><|{{ role | upper }}|>{{ content }}<|END|>
{%- endmacro -%}
{{ bos_token }}
{%- if documents %}{{ turn('system', documents | map(attribute='text') | join(' | ')) }}
{%- elif documents is none %}{{ turn('system', 'no documents') }}{%- endif %}
{%- for m in messages %}{{ turn(m.role, m.content | default('?', true)) }}{%- endfor %}
""",
    "for training": """\
{% for m in messages %}
{% if m.role == 'assistant' %}
{% generation %}
{% set inner = m.content | upper %}
{{ inner }}{{ eos_token }}
{% endgeneration %}
{% else %}
<|{{ m.role }}|>{{ m.content }}
{% endif %}
[{{ inner | default('outer') }}]
{% endfor %}
{%- generation -%}
  last
{%- endgeneration -%}
""",
    "with loop controls": """\
{% for m in messages %}
{% if m.role == 'system' %}{% continue %}{% endif %}
{% if loop.index > 4 %}{% break %}{% endif %}
{{ loop.index }}/{{ loop.length }} {{ m.role }}: {{ m.content }}
{% for word in (m.content or '').split() %}{% if word == 'stop' %}{% break %}{% endif %}\
{{ word }},{% endfor %}

{% endfor %}
""",
    "Granite with the year": (
        "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}"
        "{%- else %}{%- set system = 'The year is ' ~ strftime_now('%Y') ~ '.' %}{%- endif %}"
        "{{- '<|start_of_role|>system<|end_of_role|>' + system + '\\n' }}"
        "{%- for m in messages if m['role'] != 'system' %}"
        "{{- '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + (m['content'] or '') }}"
        "{%- endfor %}"
    ),
    "harmony": """\
{%- macro channel(name, text) -%}
<|channel|>{{ name }}<|message|>{{ text | trim }}<|end|>
{%- endmacro -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{%- if 'thinking' in m %}{{ channel('analysis', m.thinking) }}{% endif -%}
{{ channel('final', m.content | default('', true)) }}
{%- else -%}
<|start|>{{ m.name ~ ':' if m.name else '' }}{{ m.role }}<|message|>{{ m.content }}<|end|>
{%- endif -%}
{%- endfor -%}
<|start|>assistant
""",
    "many filters": """\
{{ messages | map(attribute='role') | unique | join('+') }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{ (messages | last).content | default('?', true) | replace('a', '4') | title | truncate(30) }}
{%- for key, value in messages[0].items() %} {{ key }}={{ value }}{% endfor %}
{%- for key, value in messages[0] | dictsort %} {{ loop.cycle('<', '>') }}{{ key }}{% endfor %}
{{ messages[0] is mapping }} {{ messages is iterable }} {{ pad_token is defined }}[{{ unk_token }}]
{{ messages[0].content | e }} {{ 7 // 2 }} {{ "%05.1f" | format(2.25) }} {{ [1, 2] | sum }}
{{ dict(a=1, b=[2]) }} {{ range(3) | list }} {{ "x" if none else "y" }} {{ true }}
""",
    "JSON in all ways": """\
{{ messages | tojson }}
{{ messages[0] | tojson(indent=2) }}
{{ messages[-1] | tojson(ensure_ascii=true, sort_keys=true, separators=(',', ':')) }}
{{ [bos_token, eos_token, none, 1.5, "</script>'&"] | tojson }}
""",
    "white space": """\
  {# a comment #}
    {% if messages %}
      indented {{ messages[0].role }}
    {% endif %}
{%- raw %} {{ raw }} {% endraw -%}

  {%+ if true %}kept{% endif +%}

{% set text %}
  a block
{% endset %}
[{{ text }}]
{% filter upper %}loud{% endfilter %}{{ eos_token }}
""",
}

TOOL_CALL = {
    "name": "look_up",
    "arguments": {"word": "Wörter <b>&'\"", "n": 3, "deep": [None, True]},
}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "short": [{"role": "user", "content": "  Hi there, stop\n"}],
    "long": [
        {"role": "system", "content": 'You <help> & don\'t "lie".'},
        {"role": "user", "content": "Erzähl: 日本語 ✓"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nOnce upon a time."},
        {"role": "user", "content": "more", "name": "Ann"},
        {"role": "assistant", "content": "no", "reasoning_content": "too late"},
        {"role": "user", "content": "why?"},
    ],
    "with a call": [
        {"role": "user", "content": "look it up"},
        {"content": "", "role": "assistant", "tool_calls": [{"id": "1", "function": TOOL_CALL}]},
        {"role": "tool", "content": "found", "tool_call_id": "1"},
        {"role": "tool", "content": "again", "tool_call_id": None},
        {"role": "assistant", "content": "Here.", "reasoning": "simple", "tool_calls": None},
    ],
    "in the wrong order": [
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "second"},
    ],
}
