{{- define "kvservice.name" -}}
{{- printf "%s" .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}

{{- define "kvservice.selector" -}}
app.kubernetes.io/name: kvservice
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "kvservice.labels" -}}
{{ include "kvservice.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}
